"""Any program, armed."""
