"""What one prefill or decode worker does. Knows neither Ray nor gRPC."""
