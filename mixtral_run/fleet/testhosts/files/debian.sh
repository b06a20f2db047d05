#!/bin/sh
# Runs in a container of a test release: download packages with all that a bare host lacks of their dependencies, and
# what it has installed of Python, and list them as an apt repository in /out.
set -eu
cd /out
rm -rf ./*
mkdir partial
get() { apt-get -qq -y -o Dir::Cache::archives=/out -o APT::Sandbox::User=root --download-only "$@" >/dev/null; }
apt-get -qq update
for name in "$@"; do get install --no-install-recommends "$name"; done
# shellcheck disable=SC2046
get install --reinstall $(dpkg-query --show --showformat '${db:Status-Status} ${Package}\n' '*python3*' |
    sed -n 's/^installed //p')
rm -rf partial lock
# apt writes the colon of an epoch as %3a, which it would read as a colon in a URI.
for archive in *%3a*; do
    if [ -e "$archive" ]; then mv "$archive" "$(echo "$archive" | sed 's/_[0-9]*%3a/_/')"; fi
done
chmod a+r ./*.deb
for archive in *.deb; do
    dpkg-deb --field "$archive"
    echo "Filename: ./$archive"
    echo "Size: $(stat -c %s "$archive")"
    echo "SHA256: $(sha256sum < "$archive" | cut -c1-64)"
    echo
done > Packages
{
    echo "Date: $(date --utc --rfc-email)"
    echo "SHA256:"
    echo " $(sha256sum < Packages | cut -c1-64) $(stat -c %s Packages) Packages"
} > unfinished
mv unfinished Release
