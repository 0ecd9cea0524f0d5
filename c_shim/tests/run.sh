#!/bin/sh
# The C tests, under AddressSanitizer with UBSan and under ThreadSanitizer.
set -eu
cd "$(dirname "$0")/../.."
for sanitizer in address,undefined thread; do
    directory=build/c-$(echo "$sanitizer" | cut -d, -f1)
    if [ ! -e "$directory/build.ninja" ]; then
        meson setup -Db_sanitize="$sanitizer" -Db_lundef=false -Dwerror=true "$directory" >/dev/null
    fi
    echo "C tests under $sanitizer"
    UBSAN_OPTIONS=halt_on_error=1 meson test -C "$directory" --quiet --print-errorlogs
done
