"""Call a served Florence-2: `Florence2Client("localhost:8001").ask("photo.jpg", "<OD>")`."""

from florence2_client.client import Answer, Florence2Client, ServerRefused

__all__ = ["Answer", "Florence2Client", "ServerRefused"]
