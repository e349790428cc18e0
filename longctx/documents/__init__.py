"""Documents as people have them, read into text: PDF, Office, web pages, books, archives."""
