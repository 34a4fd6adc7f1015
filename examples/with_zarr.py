"""An array on IPFS, read by zarr: `python examples/with_zarr.py CID/array.zarr`.

Only the chunks under the slice are fetched, and each is verified.
"""

import sys

import zarr

if len(sys.argv) != 2:
    print("usage: python with_zarr.py CID/array.zarr", file=sys.stderr)
    raise SystemExit(2)
array = zarr.open_array(f"ipfs://{sys.argv[1]}", mode="r")
print(array.shape, array[:2, :2])
