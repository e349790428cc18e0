"""OpenAI's Responses: answers as lists of items, stored where that is asked for."""
