//go:build linux

package main

import (
	"math"
	"slices"
	"time"
)

// latencies turns the times of transactions, in nanoseconds, into the metrics
// p50 and p99 (microseconds), rate (per second over elapsed) and n.
func latencies(times []int64, elapsed time.Duration) map[string]float64 {
	if len(times) == 0 {
		return nil
	}
	slices.Sort(times)
	return map[string]float64{
		"p50":  float64(quantile(times, 0.50)) / 1e3,
		"p99":  float64(quantile(times, 0.99)) / 1e3,
		"rate": float64(len(times)) / elapsed.Seconds(),
		"n":    float64(len(times)),
	}
}

// quantile returns the smallest element that is not below a share q of sorted,
// which must not be empty.
func quantile[T any](sorted []T, q float64) T {
	i := int(math.Ceil(q*float64(len(sorted)))) - 1
	return sorted[max(i, 0)]
}

// median returns the median of v: the mean of the middle two when their number
// is even, NaN when there is none.
func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(v))
	mid := len(s) / 2
	if len(s)%2 == 1 {
		return s[mid]
	}
	return (s[mid-1] + s[mid]) / 2
}
