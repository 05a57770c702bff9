"""Starting ranks: on this machine from a pristine fork server, or as torchrun's workers."""
