"""What people run on the client: `label`, the page (`ui`), and load (`bench`).

The command imports it; it imports the client and florence2.
"""
