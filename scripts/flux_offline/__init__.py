"""FLUX's question, offline: does a router per request beat the best layers for all requests?"""
