"""Pins at Kubo nodes: the staged files and the user's pins are linked in a folder of each node's MFS.

`batches` plans, `mfs` talks to a node and maintains the mount's folder there, `lease` says which mount a
folder belongs to, and `kubo_pins` runs the tasks.
"""
