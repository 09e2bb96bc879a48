"""An export becomes a release that clients get: installed, judged, switched to, gone back from; servers are started and
watched.

The command imports it; it imports the client, data and evaluation, and no torch.
"""
