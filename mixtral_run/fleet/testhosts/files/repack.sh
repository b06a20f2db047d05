#!/bin/sh
# Runs in a container of a test release: repack Debian's engine under the names of Docker's upstream packages.
# STAND-IN packages: the engine inside is Debian's real one; only names, versions and dependencies are changed.
set -eu
out=$1
work=$(mktemp -d)
cd "$work"
apt-get -qq update
wanted="docker.io containerd runc"
for extra in docker-cli docker-buildx; do
    if apt-cache show "$extra" >/dev/null 2>&1; then wanted="$wanted $extra"; fi
done
# shellcheck disable=SC2086
apt-get -qq download $wanted 2>/dev/null
for package in $wanted; do dpkg-deb -R "$package"_*.deb "$package"; done

version() { dpkg-deb -f "$1"_*.deb Version | sed 's/^[0-9]*://; s/[+~-].*//'; }
depends() { dpkg-deb -f "$1"_*.deb Depends | tr ',' '\n' | sed 's/^ *//' |
    grep -Ev '^(containerd|runc|docker-cli|docker\.io)( |$)' | paste -sd, - | sed 's/,/, /g'; }

control() { # folder name version depends conflicts
    {
        echo "Package: $2"
        echo "Version: $3"
        echo "Architecture: amd64"
        echo "Maintainer: mixtral-run tests <tests@localhost>"
        [ -z "$4" ] || echo "Depends: $4"
        [ -z "$5" ] || echo "Conflicts: $5"
        [ -z "$5" ] || echo "Replaces: $5"
        echo "Description: STAND-IN for Docker's $2, made from Debian's packages for tests"
    } > "$1/DEBIAN/control"
    rm -f "$1/DEBIAN/md5sums" "$1/DEBIAN/triggers"
    dpkg-deb -Znone -b "$1" "$out/$2_${3#*:}_amd64.deb" >/dev/null
}

engine="5:$(version docker.io)-1~standin"
containerd=$(version containerd)-1~standin

mkdir -p cli/DEBIAN cli/usr/bin
if [ -d docker-cli ]; then
    cp -a docker-cli/usr cli/
    cli_depends=$(depends docker-cli)
else
    mv docker.io/usr/bin/docker cli/usr/bin/docker
    cli_depends="libc6"
fi
control cli docker-ce-cli "$engine" "$cli_depends" ""

mkdir -p both
cp -a containerd/. both/
cp -a runc/usr both/
rm -rf both/usr/share/doc both/usr/share/man
control both containerd.io "$containerd" "$(depends containerd), $(depends runc)" "containerd, runc"

rm -rf docker.io/usr/share/doc docker.io/usr/share/man
control docker.io docker-ce "$engine" "$(depends docker.io), containerd.io, docker-ce-cli" "docker.io"

mkdir -p buildx/DEBIAN compose/DEBIAN
if [ -d docker-buildx ]; then cp -a docker-buildx/usr buildx/; fi
control buildx docker-buildx-plugin "0.17.1-1~standin" "" ""
# Two versions of one, for pins.
for number in 2.29.7 2.30.0; do control compose docker-compose-plugin "$number-1~standin" "" ""; done
chmod a+r "$out"/*.deb
