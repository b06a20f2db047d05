# Hold the lock of a host for the time of a bootstrap or teardown. Runs on the host, at the end of an SSH connection.
# $1: a note that names the new holder. $2: the folder of the lock. $3: seconds without a sign of life on standard input
# after which it ends. The first line of the answer is `held` and the note of a holder that was cut off, `busy` and the
# note of the holder, or `without` and the reason.
file="${MIXTRAL_RUN_LOCK_FOLDER:-$2}/mixtral-run-setup.lock"
command -v flock >/dev/null || { echo "without flock is not installed"; exit 0; }
[ -e "$file" ] || (umask 0; set -C; : > "$file") 2>/dev/null
if [ -L "$file" ] || [ ! -f "$file" ] || [ ! -r "$file" ]; then echo "without $file cannot be opened"; exit 0; fi
exec 9<"$file"
note="$(head -c 4096 "$file" | tr '\n' ' ')"
flock -n 9 || { echo "busy $note"; exit 0; }
write() { dd of="$file" conv=nocreat oflag=nofollow status=none 2>/dev/null; }
printf '%s' "$1" | write
trap : HUP TERM INT PIPE
echo "held $note"
while [ -n "$(timeout "$3" dd bs=64 count=1 status=none)" ]; do :; done
write </dev/null
