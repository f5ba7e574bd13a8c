#!/bin/sh
# Prints the path of a Chromium for the tests that look at pages; installs one where there is none.
#
#   INSTRUCTFT_BROWSER             -> that one
#   chromium, google-chrome, …     -> the first that is on the PATH
#   a Chromium of Playwright       -> that one
#   none, as root on Debian        -> apt-get install chromium
#   else                           -> Playwright fetches one into its own cache (170 MB)
#
# --find only looks, and installs nothing. The tests skip where this finds nothing; they never install.
set -eu

cd "$(dirname "$0")/.."
python=${INSTRUCTFT_PYTHON:-.venv/bin/python}

find_one() {
  if [ -n "${INSTRUCTFT_BROWSER:-}" ]; then printf '%s\n' "$INSTRUCTFT_BROWSER"; return; fi
  for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
    if command -v "$name" 2>/dev/null; then return; fi
  done
  path=$("$python" -c '
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    print(playwright.chromium.executable_path)' 2>/dev/null) || return 1
  [ -x "$path" ] || return 1
  printf '%s\n' "$path"
}

if find_one; then exit 0; fi
if [ "${1:-}" = --find ]; then exit 1; fi

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >&2 || :
fi
find_one || "$python" -m playwright install --with-deps chromium >&2 || :
find_one || { echo 'No Chromium could be installed; name one: INSTRUCTFT_BROWSER=/path/to/chromium' >&2; exit 1; }
