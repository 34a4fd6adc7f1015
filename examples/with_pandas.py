"""A table on IPFS, read by pandas: `python examples/with_pandas.py CID/table.csv`.

pandas opens `ipfs://` by fsspec, where ipfsfuse is registered. No mount is needed. Only what is read is
fetched.
"""

import sys

import pandas as pd

if len(sys.argv) != 2:
    print("usage: python with_pandas.py CID/table.csv", file=sys.stderr)
    raise SystemExit(2)
table = pd.read_csv(f"ipfs://{sys.argv[1]}")
print(table.describe())
