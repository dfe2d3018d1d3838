#!/usr/bin/env bash
# Builds the kube-apiserver that the tests start, from the source package of Debian 12, once for each machine (five to fifteen minutes).
# No distribution that the tests meet ships the program itself. Prints where it is.
set -euo pipefail

if [ -n "${KUBE_APISERVER:-}" ]; then echo "$KUBE_APISERVER"; exit 0; fi
version=1.20.2
home="${XDG_CACHE_HOME:-$HOME/.cache}/dynamo-tests"
program="$home/kube-apiserver-$version"
if [ -x "$program" ]; then echo "$program"; exit 0; fi

exec 3>&1 1>&2 # what the steps print goes to stderr; only the path goes to stdout
mkdir -p "$home"
exec 9>"$home/lock"
flock 9
if [ -x "$program" ]; then echo "$program" >&3; exit 0; fi
command -v apt-get >/dev/null || { echo "name a kube-apiserver by KUBE_APISERVER"; exit 1; }
test "$(id -u)" = 0 || { echo "run this once as root: it installs a Go compiler and the sources by apt-get"; exit 1; }

work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
echo "building kube-apiserver $version (once; five to fifteen minutes)"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
  golang-1.19-go golang-github-modern-go-reflect2-dev make openssl rsync >/dev/null

# The machine's own package sources, asked for source packages too, without a change to its settings.
mkdir -p "$work/parts" "$work/lists/partial" "$work/source"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
  case "$file" in
    *.sources) grep -qi debian "$file" && sed -E 's/^Types:.*/Types: deb-src/' "$file" >"$work/parts/$(basename "$file")" || true ;;
    *.list) grep -E '^deb .*debian' "$file" | sed -E 's/^deb /deb-src /' >"$work/parts/$(basename "$file")" || true ;;
  esac
done
apt=(apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/parts" -o "Dir::State::Lists=$work/lists" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work" && "${apt[@]}" source --download-only kubernetes)
archive=("$work"/kubernetes_*"$version"*.orig.tar.*)
test -e "${archive[0]}" || { echo "the package sources have no kubernetes $version"; ls "$work"; exit 1; }
tar -xf "${archive[0]}" -C "$work/source" --strip-components=1

# The vendored reflect2 reads maps through internals that Go 1.18 changed.
reflect2="$work/source/vendor/github.com/modern-go/reflect2"
rm -rf "$reflect2"
cp -r /usr/share/gocode/src/github.com/modern-go/reflect2 "$reflect2"
rm -f "$reflect2"/go_above_17.go "$reflect2"/go_below_17.go "$reflect2"/go_below_19.go

mkdir -p "$work/home"
cd "$work/source"
env -i PATH="/usr/lib/go-1.19/bin:$PATH" HOME="$work/home" GOCACHE="$work/gocache" GOPROXY=off GOFLAGS= CGO_ENABLED=0 FORCE_HOST_GO=y \
  KUBE_GIT_VERSION="v$version" KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=clean KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 \
  nice -n 10 make WHAT=cmd/kube-apiserver >"$home/build.log" 2>&1 || { tail -n 40 "$home/build.log"; exit 1; }
built=$(find "$work/source/_output" -type f -name kube-apiserver -perm -u+x | head -n 1)
cp "$built" "$program.new"
mv "$program.new" "$program"
echo "$program" >&3
