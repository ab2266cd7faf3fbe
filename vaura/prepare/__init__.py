"""From a folder of any videos to a prepared folder; `prepare.py` is the verb."""
