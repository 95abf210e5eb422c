"""Layouts: between the bytes of a file and the description of an array. Pure functions, which open no file.

`grid` divides an array into shards and blocks, and says where in its file each block lies. `npy` and `zarr` are the two
formats; `crc32c` is the checksum of Zarr's shard index.
"""
