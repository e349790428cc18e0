"""HTTP in front of the engine: an OpenAI-compatible server with files that are read once.

Read `app.py` first (what there is), then `chat.py` (how a question is answered) and `ingest.py`
(how a document becomes ready).
"""
