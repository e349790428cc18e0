"""The HTTP server in front of the engine: OpenAI-compatible, with files that are read only once.

Read `routes.py` first (what there is), then `completions/chat.py` (how a question is answered) and
`files/document_jobs.py` (how a document becomes ready).
"""
