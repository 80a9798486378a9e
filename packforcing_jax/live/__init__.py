"""Live sessions over HTTP and sockets: made while watched, steered by prompts, kept on disk through any end."""
