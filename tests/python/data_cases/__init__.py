"""The cases of check_data.py, by kind; each module's `cases()` gives a list of `Case`."""
