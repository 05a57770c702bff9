"""The parameter server's state machines as processes: mailboxes over sockets, journals and logs on a disk."""
