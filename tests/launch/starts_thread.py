"""What the fork server must not import: a module that starts a thread."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
