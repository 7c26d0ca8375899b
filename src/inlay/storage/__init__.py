"""Storages of the frozen weight, one file each; a storage never knows which method uses it."""
