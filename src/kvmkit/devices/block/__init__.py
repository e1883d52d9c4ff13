"""What is behind a block device: an image or a disk of the host (`raw`), or what a guest changed on one (`overlay`)."""
