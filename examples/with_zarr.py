"""An array on IPFS, read by zarr: `python examples/with_zarr.py CID/array.zarr`.

Only the chunks under the slice are fetched, and each is verified.
"""

import sys

import zarr

array = zarr.open_array(f"ipfs://{sys.argv[1]}", mode="r")
print(array.shape, array[:2, :2])
