#!/bin/sh
# Prints the path of axe-core, which looks for what screen readers and keyboards stumble over; fetches it through npm.
#
# --find only looks, and fetches nothing. The test that needs it skips where this finds nothing; it never fetches.
set -eu

cd "$(dirname "$0")/.."
version=4.14.1
# of the package, as the registry gives it: npm view axe-core@$version dist.integrity
integrity='sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=='
folder=.cache/axe-core-$version

if [ -f "$folder/axe.min.js" ]; then printf '%s\n' "$PWD/$folder/axe.min.js"; exit 0; fi
if [ "${1:-}" = --find ]; then exit 1; fi

command -v npm >/dev/null || { echo 'axe-core comes through npm, which is not installed' >&2; exit 1; }
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
(cd "$new" && npm pack --silent "axe-core@$version") >/dev/null
package=$new/axe-core-$version.tgz
found="sha512-$(openssl dgst -sha512 -binary "$package" | openssl base64 -A)"
[ "$found" = "$integrity" ] || { echo "axe-core $version: found $found, expected $integrity" >&2; exit 1; }
mkdir -p "$folder"
tar -xzf "$package" -C "$new" package/axe.min.js
mv "$new/package/axe.min.js" "$folder/axe.min.js"
printf '%s\n' "$PWD/$folder/axe.min.js"
