"""What is run over many cells, variants or model types, and written as rows; no command of the package needs it."""
