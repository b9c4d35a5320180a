"""A local gateway in front of Ollama: other programs' requests for the VLM load it first and run under a lease.

`guard` - who may come in: Host, Origin, token
`client` - one request's caller: bounded bodies, slow readers, and knowing when it has left
`relay` - on to Ollama and back, byte by byte
`leases` - the card, lent to programs that we do not manage
`app`, `serve` - the whole as an ASGI application, and as a server in a thread
"""
