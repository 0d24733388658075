"""What becomes of each entry of the ledger: a line of JSON in a folder, a row in a database."""
