"""Adapters that let other libraries call flashcute. Each is imported by name, and imports its library when asked to."""
