"""What the rooms above run on: devices, randomness, files, processes. Nothing here knows of brains."""
