"""Before a picture is encoded: filters, crops, and what is dropped."""
