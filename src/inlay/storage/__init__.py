"""How the frozen weight is held. One file a format; a storage never knows which method uses it."""
