#!/bin/sh
# The C tests, under AddressSanitizer with UBSan and under ThreadSanitizer; and, where there
# is a clang, built by it as well.  Every warning is an error.
set -eu
cd "$(dirname "$0")/../.."

run() { # NAME COMPILER MESON-OPTION...
    directory=build/c-$1
    compiler=$2
    shift 2
    if [ ! -e "$directory/build.ninja" ]; then
        CC=$compiler meson setup "$@" -Db_lundef=false -Dwerror=true "$directory" >/dev/null
    fi
    echo "C tests: $directory"
    UBSAN_OPTIONS=halt_on_error=1 meson test -C "$directory" --quiet --print-errorlogs
}

run address gcc -Db_sanitize=address,undefined
run thread gcc -Db_sanitize=thread
if command -v clang >/dev/null; then
    run clang clang -Dbuildtype=release
fi
