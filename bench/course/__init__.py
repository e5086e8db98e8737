"""The course's notebook beside clext."""
