"""What an exported folder needs beside the weights."""
