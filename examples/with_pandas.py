"""A table on IPFS, read by pandas: `python examples/with_pandas.py CID/table.csv`.

pandas opens `ipfs://` by fsspec, where ipfsfuse is registered. No mount is needed. Only what is read is
fetched.
"""

import sys

import pandas as pd

table = pd.read_csv(f"ipfs://{sys.argv[1]}")
print(table.describe())
