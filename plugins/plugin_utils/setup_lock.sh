# Hold the lock of a host for the time of a bootstrap or teardown. Runs on the host, at the end of an SSH connection.
# $1: a note that names the new holder. $2: the folder of the lock. $3: seconds without a sign of life on standard input
# after which it ends. $4: `password` if the first line of standard input is the password of the user for sudo. The
# first line of the answer is `held` and the note of a holder that was cut off, `busy` and the note of the holder, or
# `without` and the reason.
# Only the owner of the folder, root, can open the lock. Otherwise any user of the host could hold it forever.
program=$(cat <<'END'
file=$2/setup.lock
umask 077
without() { echo "without $*"; exit 0; }
command -v flock >/dev/null || without flock is not installed
[ -d "$2" ] || mkdir "$2" 2>/dev/null
if [ -L "$2" ] || [ ! -d "$2" ] || [ ! -O "$2" ] || [ -n "$(find "$2" -maxdepth 0 -perm /022)" ]; then
    without "$2 is no folder that $(id -un) alone can write"
fi
[ -e "$file" ] || [ -L "$file" ] || (set -C; : >"$file") 2>/dev/null
if [ -L "$file" ] || [ ! -f "$file" ] || [ ! -O "$file" ]; then without "$file is no file of $(id -un)"; fi
chmod 600 "$file" && exec 9<"$file" || without "$file cannot be opened"
note="$(head -c 4096 "$file" | tr '\n' ' ')"
flock -n 9 || { echo "busy $note"; exit 0; }
# Versions before this one hold a file that every user can open. Such a lock counts if a process has the file open whose
# user may become root anyway. Held here as well, the file keeps those versions away.
case $2 in /run/mixtral-run) old=/run/lock ;; *) old=$2 ;; esac
old=$old/mixtral-run-setup.lock
may_change_the_host() {
    [ "$1" != root ] && [ "$1" != "$(id -un)" ] && [ "$1" != "$SUDO_USER" ] || return 0
    case " $(id -nG "$1" 2>/dev/null) " in *" sudo "* | *" admin "* | *" wheel "* | *" docker "*) ;; *) return 1 ;; esac
}
if [ -f "$old" ] && [ ! -L "$old" ] && command exec 8<"$old" && [ "$(readlink /proc/self/fd/8)" = "$old" ]; then
    flock -n 8 || {
        theirs="$(head -c 4096 <&8 | tr '\n' ' ')"
        exec 8<&-
        for fd in $(find /proc/[0-9]*/fd -lname "$old" 2>/dev/null); do
            ! may_change_the_host "$(stat -c %U "${fd%/fd/*}" 2>/dev/null)" || { echo "busy $theirs"; exit 0; }
        done
    }
fi
write() { dd of="$file" conv=nocreat oflag=nofollow status=none 2>/dev/null; }
printf '%s' "$1" | write
trap : HUP TERM INT PIPE
echo "held $note"
while [ -n "$(timeout "$3" dd bs=64 count=1 status=none)" ]; do :; done
write </dev/null
END
)
folder="${MIXTRAL_RUN_LOCK_FOLDER:-$2}" password=
[ "$4" != password ] || IFS= read -r password
[ "$(id -u)" != 0 ] && [ ! -O "$folder" ] || exec sh -c "$program" lock "$1" "$folder" "$3"
# Look with the command that follows: sudoers may ask for a password for one command and not for another.
! sudo -n sh -c : 2>/dev/null </dev/null || exec sudo -n sh -c "$program" lock "$1" "$folder" "$3"
# With -k sudo always asks. Without it, sudo would not ask again, and the password would be input of root's command.
if [ -n "$password" ] && printf '%s\n' "$password" | sudo -k -S -p '' sh -c : 2>/dev/null; then
    { printf '%s\n' "$password"; exec cat; } | sudo -k -S -p '' sh -c "$program" lock "$1" "$folder" "$3"
    exit
fi
echo "without $folder/setup.lock belongs to root, and sudo refuses $(id -un) or asks for a password"
