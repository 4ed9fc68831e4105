"""Requests to servers over HTTP, and OpenAI's chat API."""
