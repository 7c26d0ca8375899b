"""The methods, one file each, the equation first; a method never knows the storage."""
