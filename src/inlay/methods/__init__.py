"""What is trained. One file a method, the equation first; a method never knows the storage."""
