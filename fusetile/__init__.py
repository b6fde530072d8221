"""fusetile: train convolutional networks on a handful of small computers, with no server."""
