"""The crash laboratory: what blockstore promises, tried on disks that lose power and in processes that are killed."""
