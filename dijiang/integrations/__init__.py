"""Other projects' interfaces, one file each, on the public API alone. Nothing but a verb imports them."""
