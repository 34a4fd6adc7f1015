"""What is pinned at Kubo nodes: the files that are staged here and what the user pinned, in folders of the
nodes' MFS.

`batches` decides, `mfs` speaks to a node and keeps one mount's folder there, `lease` knows whose a folder is,
and `kubo_pins` runs the tasks.
"""
