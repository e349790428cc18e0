"""What every route uses: who asks, how bodies are read, how answers and errors are written."""
