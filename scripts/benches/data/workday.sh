#!/bin/sh
# The work recorded in workday.trace: Python programs that start, C files that are compiled, and now and then a search
# through everything. $1 is a folder that holds python/ (the standard library of Python 3.11, compiled, without its tests) and
# c/ (musl/, include/x86_64-linux-musl/, include/generic-musl/ of ziglang 0.17), added to the library and mounted. Recorded by
#     python scripts/benches/trace.py MOUNTPOINT/CID workday.trace sh workday.sh MOUNTPOINT/CID
tree=$1
programs="argparse,json http.client,ssl unittest,doctest asyncio sqlite3,csv xml.dom.minidom email.message,mailbox
concurrent.futures,multiprocessing logging.handlers,configparser tarfile,zipfile pydoc,inspect decimal,fractions,statistics"
musl=$tree/c/musl
flags="-nostdinc -std=c99 -D_XOPEN_SOURCE=700 -w -I $musl/arch/x86_64 -I $musl/arch/generic -I $musl/src/include -I $musl/src/internal"
flags="$flags -I $tree/c/include/x86_64-linux-musl -I $tree/c/include/generic-musl"

start_programs() {
  for modules in $programs; do PYTHONPATH=$tree/python python3 -c "import $modules"; done
}
compile() { # every file of a folder of the library
  for file in "$musl/src/$1"/*.c; do gcc $flags -c "$file" -o /dev/null 2> /dev/null; done
}
search() { find "$1" -type f -print0 | xargs -0 grep -l -- "$2" > /dev/null; }

start_programs; compile string; start_programs
search "$tree" setlocale
start_programs; compile stdlib; compile string; start_programs
search "$tree/python" deprecated
compile string; start_programs; compile dirent
search "$tree" memcpy
start_programs; compile string; compile stdlib; start_programs
