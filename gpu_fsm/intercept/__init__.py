"""Doors for code that knows nothing of us: its requests for the VLM load it first and run under a lease.

`needs` - what a request asks of the card
`answers` - what a client is told instead of an answer
`doors` - the rules that every door keeps, and leases that end whatever happens
`requests_adapter`, `httpx_transport`, `decorators` - the doors of one process; the gateway is the one for others
"""
