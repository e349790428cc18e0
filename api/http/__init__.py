"""What every route uses: authentication, bodies, errors, streams and the route table's entries."""
